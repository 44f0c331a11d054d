"""From a click log to batches: synthetic.py draws one, prepare.py encodes one, reader.py reads either."""
