"""The report: every number of a run, with the way it was measured, on one self-contained page.

Read `results` (the stages' files => values), `figures` (values => pictures), `page` (values =>
HTML, Markdown and a JSON summary). The room may import only files and types, and no torch.
"""
