"""Jobs that survive a crash: what to run (`spec`), where it is written (`store`), what it would do (`plan`)."""
