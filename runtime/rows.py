"""What the host knows of each row that is fed: its position, its image, its patch, its role."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

TEXT = -1  # image number of a row that belongs to no image


@dataclass(frozen=True)
class Rows:
    """Rows of one prefill, or those of them that a stage kept.

    Attributes:
        position_ids: Rotary position, int64 [L]; for a model with A rotary sections [L, A].
        image: Number of the row's image in the conversation, TEXT for text, int64 [L].
        patch_ids: Raster index on the image's patch grid, -1 for none, int64 [L].
        places: Place among the image's tokens that entered the decoder, -1 for text, int64 [L].
        is_instruction: The row holds a token of the last question, bool [L].
        sizes: Patches that the row stands for, 1 for text, float32 [L].
        side_of: For a side row the image that it judges, TEXT for all others, int64 [L]. Side rows
            come after all others; their `image` is TEXT.
        next_position: Of the row after all of them, dropped or not, side rows not counted.
    """

    position_ids: np.ndarray
    image: np.ndarray
    patch_ids: np.ndarray
    places: np.ndarray
    is_instruction: np.ndarray
    sizes: np.ndarray
    side_of: np.ndarray
    next_position: int

    def __len__(self) -> int:
        return len(self.position_ids)

    def take(self, indices: np.ndarray) -> Rows:
        """The rows at some indices."""
        return Rows(
            self.position_ids[indices],
            self.image[indices],
            self.patch_ids[indices],
            self.places[indices],
            self.is_instruction[indices],
            self.sizes[indices],
            self.side_of[indices],
            self.next_position,
        )

    def with_side_rows(self) -> Rows:
        """The rows, and after them a side row for each image that is fed.

        Its position is that of the first text after the image, which it does not shift.
        """
        images = self.images()
        none = np.full(len(images), TEXT)
        behind_all = np.full_like(self.position_ids[:1], self.next_position)
        positions = np.concatenate((self.position_ids, behind_all))
        is_text = np.append(self.image == TEXT, True)
        following = [
            self.of_image(image)[-1] + np.argmax(is_text[self.of_image(image)[-1] :])
            for image in images
        ]
        return Rows(
            np.concatenate((self.position_ids, positions[following])),
            np.concatenate((self.image, none)),
            np.concatenate((self.patch_ids, none)),
            np.concatenate((self.places, none)),
            np.concatenate((self.is_instruction, none != TEXT)),
            np.concatenate((self.sizes, np.ones(len(images), np.float32))),
            np.concatenate((self.side_of, np.array(images, np.int64))),
            self.next_position,
        )

    def merge(self, image: int, moved: np.ndarray) -> Rows:
        """The rows after tokens of an image merged into others, which count for them too.

        Args:
            image: Number of the image.
            moved: Which of its N tokens each merged into, its own place where it did not, [N].
        """
        mine, sizes = self.of_image(image), self.sizes.copy()
        sizes[mine] = np.bincount(moved, weights=sizes[mine], minlength=len(mine))
        return replace(self, sizes=sizes)

    @property
    def num_side(self) -> int:
        """Side rows among them."""
        return int((self.side_of != TEXT).sum())

    def side_row(self, image: int) -> np.ndarray:
        """Index of an image's side row, [1]; [0] if it has none."""
        return np.flatnonzero(self.side_of == image)

    def last_seen(self) -> np.ndarray:
        """The last row but itself that each row sees, [L]: a side row, its image's last."""
        seen = np.arange(len(self))
        for row in np.flatnonzero(self.side_of != TEXT):
            seen[row] = self.of_image(self.side_of[row])[-1]
        return seen

    def images(self) -> list[int]:
        """Numbers of the images among the rows, ascending."""
        return [int(number) for number in np.unique(self.image) if number != TEXT]

    def of_image(self, image: int) -> np.ndarray:
        """Indices of an image's rows, [N]."""
        return np.flatnonzero(self.image == image)

    def text_for(self, image: int) -> np.ndarray:
        """Rows that judge an image: the question after it, [T].

        If the question comes before the image, every later text row judges it (the opening of the
        answer, at least). If no text follows, the last row does.
        """
        last = self.of_image(image)[-1]
        later = (np.arange(len(self)) > last) & (self.image == TEXT) & (self.side_of == TEXT)
        for chosen in (later & self.is_instruction, later):
            if chosen.any():
                return np.flatnonzero(chosen)
        return self.last_row()

    def last_row(self) -> np.ndarray:
        """Index of the last row that is no side row, [1]."""
        return np.array([len(self) - self.num_side - 1])
