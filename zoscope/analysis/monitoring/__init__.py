"""Following the threshold in a loop that is not zoscope's."""
