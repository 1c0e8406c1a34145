"""A run directory → report.html: reading → record → answer, facts, figures, commands → page. No torch is loaded."""

from ddpm_ema.report.writing import main, write

__all__ = ["main", "write"]
