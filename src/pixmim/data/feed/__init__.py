"""From a data set to the loop: the order, the crops, and where decoded images stay."""
