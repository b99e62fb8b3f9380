"""A trained model outside the pipeline: `from contradiff import ContraDiff`.

Read `folder` (the form of an exported model), `project` (a pipeline's results => such a model),
`model_card`, `hub` (download and upload), `images` (what users give), `model` (the class
ContraDiff), `pipeline` (for diffusers) and `transformer` (for scikit-learn).
"""
