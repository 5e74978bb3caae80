"""What came out of runs and studies, drawn and told. Everything here reads run directories and nothing else."""
