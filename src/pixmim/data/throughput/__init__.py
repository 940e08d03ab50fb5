"""What limits the way of somebody's images to the network, measured, and what would help."""
