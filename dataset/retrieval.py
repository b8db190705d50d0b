"""Image-text retrieval data: images with all their captions."""

from dataset.annotations import Entries, Entry, Texts
from dataset.base import EntryDataset
from dataset.images import absolute, load_image
from dataset.text import Limits


class CaptionedImage(Entry):
    """An image with all its captions, to test on."""

    wanted = (
        'a retrieval test needs an entry {"image": path, "caption": list of texts} for each image'
    )
    image: str
    caption: Texts

    @property
    def texts(self):
        return self.caption


class RetrievalTestSet(EntryDataset):
    """The images of retrieval test files, with their captions beside them; item i is uint8 [3, R,
    R].

    Entries with the same absolute image path become one image with all their captions, including
    equal ones.

    images: path of each image, as in its first entry; texts: all captions, cleaned up, image by
    image; img2txt: the text indices of each image; txt2img: the image index of each text. Raises
    InputError for an entry without image or captions.
    """

    def __init__(self, files, image_root, transform, limits=Limits()):
        entries, captions, first = Entries(files, CaptionedImage), {}, []
        for i, entry in enumerate(entries):
            path = absolute(image_root, entry.image)
            if path not in captions:
                first.append(i)
            captions.setdefault(path, []).extend(entry.texts)
        super().__init__(
            entries, {"image_root": image_root}, transform, indices=first, limits=limits
        )
        self.images, self.texts, self.img2txt, self.txt2img = (
            [entries[i].image for i in first],
            [],
            [],
            [],
        )
        for i, texts in enumerate(captions.values()):
            self.img2txt.append(list(range(len(self.texts), len(self.texts) + len(texts))))
            self.txt2img.extend([i] * len(texts))
            self.texts.extend(self.clean(i, text) for text in texts)

    def read(self, index):
        (file,) = self.files(index)
        return self.transform(load_image(file))
