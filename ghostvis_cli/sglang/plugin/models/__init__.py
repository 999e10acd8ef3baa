"""The model classes, by the names that converted directories give them."""
