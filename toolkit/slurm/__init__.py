"""SLURM: from one command to jobs that survive their time limit. Nothing here imports torch but `task`.

settings   what a job asks for: command, recipe, cluster profile, in this order
script     the text that sbatch gets
submit     a run, or an array of runs, handed to SLURM
job        what SLURM knows of a run, and what its run directory does
inside     what a job's script calls: begin a run, claim one of an array, make the table
task       what every training process of a job runs
"""
