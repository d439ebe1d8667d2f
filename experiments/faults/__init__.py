"""What `experiments.torture` does to runs and files, a kind of fault a module.

Each has JOBS: name -> (trials in full, function), where function(sandbox, seed)
returns the trials that this seed makes.
"""
