"""Raw images as people have them => shards. Nothing is unpacked or downloaded.

Read `listing` (images by class), then the sources that list them: `folder` (class folders, Kaggle),
`archive` with `tars` (ILSVRC's archives), `parquet`; `imagenet` chooses among them.
`image_check` and `packing` put images into shards. `cifar` with `cifar_pickle`, and `transfer_set`,
read the set of the transfer stage. The room may import `data` and what is below it.
"""
