"""K-means on frozen features (arXiv 2008.10312), over shards of the images."""
