"""Which names of folders are splits of a data set: train, val, test and their kin."""

import re
import unicodedata
from collections.abc import Iterable

from .names import normal_form

_WORDS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
    "held out": ("holdout", "heldout"),
}
PLAIN = {word: plain for plain, words in _WORDS.items() for word in words}
_GLUED = re.compile(rf"^({'|'.join(sorted(PLAIN, key=len, reverse=True))})(data|dataset|set|split|images?|imgs?|[0-9]+k?)$")


def words_of(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


# What may stand beside the word of a split in a folder's name, and says nothing about what is on the images.
FILLERS = words_of(
    "data dataset datasets set split subset part folder files image images img imgs picture pictures photo photos jpeg jpg png "
    "public private seg cls hr lr"
)
# In other languages, and cut short. Some of these words mean other things, too, so they count only where two of them differ.
_FOREIGN = {
    "train": (
        "trainings entrainement apprentissage entrenamiento treino treinamento addestramento allenamento trening treningowy "
        "egitim обучение обучающая тренировка тренировочная trn tr 训练 訓練 学習 훈련 학습"
    ),
    "val": (
        "validierung validierungs validacion validacao validazione walidacja walidacyjny validatie dogrulama валидация "
        "валидационная проверка vld va 验证 驗證 検証 검증"
    ),
    "test": "essai prueba pruebas teste testes prova testowy тест тестовая тестирование tst te ts 测试 測試 テスト 테스트",
}
_FOREIGN_WORDS = {word: plain for plain, words in _FOREIGN.items() for word in words.split()}
_FOREIGN_FILLERS = words_of(
    "daten bilder satz menge datos dati dados donnees dane imagenes imagens immagini zdjecia conjunto jeu ensemble "
    "de di d da des du der die das данные выборка изображения 集 数据 数据集 データ 用 세트 셋 데이터 データセット 資料"
)
_FOREIGN_GLUED = re.compile(
    "^(trainings?|validierungs?|validatie|test|训练|訓練|学習|훈련|학습|验证|驗證|検証|검증|测试|測試|テスト|테스트)"
    "(daten|bilder|satz|menge|set|用?データ|用|集|数据集?|資料|세트|셋|데이터)?$"
)


def tokens(name: str) -> list[str]:
    """The words of a folder's name: `TrainingSet (1)` is training, set, 1."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", normal_form(name))
    return [word for word in re.split(r"[\W_]+", parted.casefold()) if word]


def words_joined(name: str) -> str:
    """The words of a folder's name in small letters, with nothing between them."""
    return "".join(tokens(name))


def split_of(name: str) -> str | None:
    """train, val, test or held out, where a folder's name says that it is one: `train`, `Training Data`, `val2017`,
    `test_images`, `trainA`. A name that means something else beside that word (`train station`, `trains`) says nothing."""
    if words_joined(name) in PLAIN:  # `held-out`, too
        return PLAIN[words_joined(name)]
    if domain := re.fullmatch(r"(train|val|test)[ _-]?[AB]", name):
        return domain[1]
    words = [word for word in tokens(name) if word not in FILLERS and not re.fullmatch(r"v?\d+(k|px)?", word)]
    if len(words) != 1:
        return None
    glued = _GLUED.match(words[0])
    return PLAIN.get(glued[1] if glued else words[0])


def _foreign_split_of(name: str) -> str | None:
    """The same of a name in another language, or cut short."""
    plain = "".join(c for c in unicodedata.normalize("NFD", name) if not "\u0300" <= c <= "\u036f")
    words = [word for word in tokens(plain) if word not in FILLERS | _FOREIGN_FILLERS and not word.isdecimal()]
    if len(words) != 1:
        return None
    glued = _FOREIGN_GLUED.match(words[0])
    word = glued[1] if glued else words[0]
    return _FOREIGN_WORDS.get(word) or PLAIN.get(word)


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """{folder: train, val, test or held out} of those that are splits: by their own names, or because folders differ in that
    word alone, as `asl_alphabet_train` and `asl_alphabet_test` do."""
    names = list(names)
    splits = {name: split for name in names if (split := split_of(name)) is not None}
    others: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        words = tokens(name)
        positions = [i for i, word in enumerate(words) if word in PLAIN]
        if len(positions) == 1 and len(words) > 1:
            rest = (*words[: positions[0]], "*", *words[positions[0] + 1 :])
            others.setdefault(rest, {})[name] = PLAIN[words[positions[0]]]
    for alike in others.values():
        if len(set(alike.values())) > 1:
            splits |= alike
    foreign = {name: split for name in names if name not in splits and (split := _foreign_split_of(name)) is not None}
    if len({*splits.values(), *foreign.values()}) > 1:
        splits |= foreign
    return {name: splits[name] for name in names if name in splits}
