"""Facts about programs that passes and targets share."""
