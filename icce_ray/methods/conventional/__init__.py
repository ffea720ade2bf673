"""Scikit-learn's clusterers on frozen features (docs/METHOD.md, "Conventional clusterers")."""
