"""The networks, one family a file. Each is written with BatchNorm and takes photos in [0, 1]; `fedgc.models` is the door."""
