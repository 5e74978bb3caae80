"""SLURM support: jobs that survive their time limit. Only `job_worker` and `search_task` import torch.

settings        resources of a job, from the command, the recipe and the cluster profile
sbatch          generation of sbatch scripts
submit          submission of a run
array           submission of a study as a job array
job_status      state of a run from its directory and from SLURM
job_entry       commands called by job scripts: create a run, or claim one of a study
job_worker      entry point of the training processes of a job
search_task     entry point of an array task that works on a search
"""
