"""One page about one run or several, from the logs that they have written."""
