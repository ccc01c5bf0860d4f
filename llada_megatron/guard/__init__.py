"""What watches over ranks, whatever they compute: nodes, locks, signals, hangs, slow ranks, agreement."""
