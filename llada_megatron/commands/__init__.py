"""One file per verb, named as the verb: its arguments, and a few calls to the rooms below."""
