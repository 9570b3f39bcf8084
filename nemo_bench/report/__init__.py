"""Run records, and the numbers made from them."""
