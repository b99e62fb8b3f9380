"""The demo page: what a trained model says about an image that is dropped on it.

Read `answers` (a model and an image => HTML, piece by piece), `figures` (the HTML of bars and
pictures), `page` (the layout, in gradio) and `server` (the page at 127.0.0.1, without network).
"""
