"""The data sets that `blip2 data convert` reads, a line each; the command line takes their names from here."""

# Name on the command line -> module of this folder and function in it (a `pipeline.Reader`).
READERS = {
    "coco": "captions.read_coco",
    "vg": "genome.read_genome",
    "cc3m": "web.read_web",
    "cc12m": "web.read_web",
    "sbu": "web.read_web",
    "laion": "web.read_web",
    "flickr30k": "captions.read_flickr30k",
    "nocaps": "captions.read_nocaps",
    "vqav2": "questions.read_vqa",
    "gqa": "questions.read_gqa",
    "okvqa": "questions.read_vqa",
    "lavis": "tables.read_list",
    "albef": "tables.read_list",
    "blip": "web.read_web",
    "imagefolder": "tables.read_imagefolder",
    "table": "tables.read_table",
    "jsonl": "folders.read_json_lines",
    "folder": "folders.read_image_folder",
}
