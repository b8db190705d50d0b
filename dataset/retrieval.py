"""Image-text retrieval data: images with all their captions."""

from dataset.annotations import Entries, Entry, Texts
from dataset.base import EntryDataset
from dataset.images import load_image


class CaptionedImage(Entry):
    """An image with all its captions, to test on."""

    wanted = 'a retrieval test needs an entry {"image": path, "caption": list of texts} for each image'
    image: str
    caption: Texts

    @property
    def texts(self):
        return self.caption


class RetrievalTestSet(EntryDataset):
    """The images of retrieval test files, with their captions beside them; item i is uint8 [3, R, R].

    images: path of each image, as in the file; texts: all captions, cleaned up; img2txt: for each image the list of its
    texts; txt2img: for each text its image. Raises InputError for an entry without image or captions.
    """

    def __init__(self, files, image_root, transform):
        super().__init__(Entries(files, CaptionedImage), {"image_root": image_root}, transform)
        self.images, self.texts, self.img2txt, self.txt2img = [], [], [], []
        for i, entry in enumerate(self.entries):
            self.img2txt.append(list(range(len(self.texts), len(self.texts) + len(entry.texts))))
            self.txt2img.extend([i] * len(entry.texts))
            self.images.append(entry.image)
            self.texts.extend(map(entry.clean, entry.texts))

    def read(self, index):
        (file,) = self.files(index)
        return self.transform(load_image(file))
