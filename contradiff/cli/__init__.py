"""The command line `contradiff`.

Read `app` (the commands), `options` (what several commands take), `images` (lists of files in,
files of features and samples out), `demo`, `progress` and `presets`. A module here imports torch
and diffusers only where a command computes, so that `contradiff --help` answers at once.
"""
