"""Plots and HTML reports of runs and studies. Everything here reads run directories only."""
