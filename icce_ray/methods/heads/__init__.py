"""Many clustering heads, trained side by side on frozen features (docs/METHOD.md, "Heads"): ICCE, TEMI and SCAN."""
