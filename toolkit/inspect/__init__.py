"""Looking before leaping: what a recipe will cost, and what its data are like. Nothing here trains."""
