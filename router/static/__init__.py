"""What browsers load: the dashboard, and uPlot 1.6.32 (MIT, see uPlot.LICENSE)."""
