//! vCPU threads: run, kick, pause, resume.
