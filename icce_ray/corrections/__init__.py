"""What a person changed about the clusters on the page: names, merges, splits, images moved or dropped."""
