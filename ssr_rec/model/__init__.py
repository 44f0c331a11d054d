"""The model: tables, over-arch, heads and loss, sharded or plain."""
