"""Plots and HTML reports of runs and studies. They only read run directories; nothing is trained."""
