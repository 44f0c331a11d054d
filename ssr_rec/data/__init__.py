"""Turns a click log into batches: synthetic/ draws one, preparation/ encodes one, reader.py reads either."""
