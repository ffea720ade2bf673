"""Manual corrections made on the page: clusters named, merged or split, images moved or dropped."""
