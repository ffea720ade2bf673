"""Stage 1: many clustering heads, trained side by side on frozen features (METHOD section 2)."""
