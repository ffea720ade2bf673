"""TURTLE: labels that linear classifiers learn quickly (docs/METHOD.md, "TURTLE")."""
