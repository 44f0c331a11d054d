"""Puts the model together: tables, over-arch, heads and loss, sharded or plain."""
