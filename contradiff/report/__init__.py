"""The report: one self-contained page with all results of a run, and how each was measured.

Read `results` (reads the stages' files), `figures` (draws PNGs), and `page` (writes HTML, Markdown
and a JSON summary). This room imports neither torch nor another room.
"""
