"""Methods compared on the tasks of a suite: `gift benchmark`."""
