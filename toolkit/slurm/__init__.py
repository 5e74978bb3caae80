"""SLURM: from one command to jobs that survive their time limit. Nothing here imports torch but `task` and `search`.

settings   what a job asks for: command, recipe, cluster profile, in this order
script     the text that sbatch gets
submit     a run handed to SLURM
array      a study handed to SLURM as a job array
job        what SLURM knows of a run, and what its run directory does
inside     what a job's script calls: begin a run, claim one of an array
task       what every training process of a job runs
search     what a task of an array runs that works on a search
"""
