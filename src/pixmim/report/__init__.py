"""HTML reports of runs and evaluations."""

from pixmim.report.page import DATA_MARK, gain_lines, results_table, write_report

__all__ = ["DATA_MARK", "gain_lines", "results_table", "write_report"]
