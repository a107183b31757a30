"""Methods that replace dense layers by products of smaller ones."""
