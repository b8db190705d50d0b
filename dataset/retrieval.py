"""Image-text retrieval data: images with all their captions."""

import os

from dataset.annotations import check_entry, read_json_list, where
from dataset.samples import Samples
from dataset.text import MAX_WORDS, is_blank, pre_caption
from dataset.images import load_image
from utils import InputError


def captioned_image(entry, path, number):
    """The captions, cleaned up, of an entry {image, caption: list of strings}. Raises InputError."""
    if isinstance(entry.get("caption"), str):
        raise InputError(f"{where(path, number)}: its caption is one string: this is a training list; val_file and "
                         "test_file need an entry for each image, with the list of its captions", "wrong 'caption'")
    check_entry(entry, {"image": str, "caption": list}, path, number)
    texts = [pre_caption(caption, MAX_WORDS) for caption in entry["caption"]]
    if any(map(is_blank, texts)):
        raise InputError(f"{where(path, number)}: a caption is empty after clean-up; correct or remove it", "empty text")
    return texts


class RetrievalTestSet(Samples):
    """The images of retrieval test files, with their captions beside them; item i is uint8 [3, R, R].

    images: path of each image, as in the file; texts: all captions, cleaned up; img2txt: for each image the list of its
    texts; txt2img: for each text its image. Raises InputError for an entry without image or captions.
    """

    def __init__(self, files, image_root, transform):
        super().__init__()
        self.roots = {"image_root": image_root}
        self.transform = transform
        self.images, self.texts, self.img2txt, self.txt2img, self._where = [], [], [], [], []
        for path in files:
            for number, entry in read_json_list(path):
                texts = captioned_image(entry, path, number)
                self.img2txt.append(list(range(len(self.texts), len(self.texts) + len(texts))))
                self.txt2img.extend([len(self.images)] * len(texts))
                self.images.append(entry["image"])
                self.texts.extend(texts)
                self._where.append((path, number))

    def __len__(self):
        return len(self.images)

    def files(self, index):
        return [os.path.join(self.roots["image_root"], self.images[index])]

    def where(self, index):
        return where(*self._where[index])

    def read(self, index):
        (file,) = self.files(index)
        return self.transform(load_image(file))
