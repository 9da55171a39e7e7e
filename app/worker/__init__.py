"""Workers: they run the jobs. Training itself runs in child processes, so a worker never loads torch."""
