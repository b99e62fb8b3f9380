"""The report: one self-contained page with all results of a run, and how each was measured.

`results` reads the stages' files. `figures` draws PNGs. `page` writes HTML, Markdown and a JSON
summary. This package imports neither torch nor another package of the project.
"""
