"""Seeded generator of the small stories that the demo model is trained on.

Every story is one line of plain text. A plot is a list of beats; a beat is a tuple of alternative
sentences, one of which is written (an empty one skips the beat). Inside a sentence, ``[a|b]``
picks one of the alternatives, ``<list>`` picks a fresh word from WORDS, and ``{slot}`` is
filled from the cast, which stays the same for the whole story: that is what gives a language
model something to remember over many sentences.
"""

from __future__ import annotations

import random
import re
from collections.abc import Container, Iterator

# kind: (home, food, sound, what it does well, a body part)
ANIMALS = {
    "fox": ("a den under the hill", "berries", "barks", "sneak", "a bushy tail"),
    "rabbit": ("a burrow in the meadow", "carrots", "squeaks", "hop", "long ears"),
    "bear": ("a cave in the mountains", "honey", "growls", "climb", "thick fur"),
    "mouse": ("a hole in the wall", "cheese", "squeaks", "hide", "a thin tail"),
    "owl": ("a hollow oak", "beetles", "hoots", "see in the dark", "round eyes"),
    "duck": ("the reeds by the pond", "pond weed", "quacks", "swim", "flat feet"),
    "frog": ("the muddy pond", "flies", "croaks", "jump", "wet green skin"),
    "hedgehog": ("a pile of leaves", "snails", "snuffles", "roll up", "sharp spines"),
    "squirrel": ("a nest in the pine tree", "nuts", "chatters", "climb", "a fluffy tail"),
    "goat": ("a shed on the hill", "grass", "bleats", "climb", "two horns"),
    "otter": ("a hole by the river", "fish", "whistles", "swim", "smooth brown fur"),
    "badger": ("a deep tunnel", "roots", "grunts", "dig", "a striped face"),
    "mole": ("a dark tunnel", "worms", "squeaks", "dig", "tiny eyes"),
    "crow": ("a nest of sticks", "seeds", "caws", "fly", "shiny black wings"),
    "cat": ("a warm house", "fish", "purrs", "sneak", "soft paws"),
    "dog": ("a wooden hut", "bones", "barks", "run", "a wet nose"),
    "horse": ("a big stable", "hay", "neighs", "run", "strong legs"),
    "hen": ("a small coop", "corn", "clucks", "scratch", "brown feathers"),
    "bee": ("a busy hive", "nectar", "buzzes", "fly", "four thin wings"),
    "turtle": ("a nest on the shore", "leaves", "hisses", "swim", "a hard shell"),
}
CHILD = ("a small house", "bread", "talks", "run", "bright eyes")
PLURALS = {"fox": "foxes", "mouse": "mice"}  # all the others take an s
HE_NAMES = "Tom Ben Max Leo Finn Oscar Jack Hugo Sam Ned Milo Otto Gus Theo Felix Rufus".split()
SHE_NAMES = "Mia Lily Anna Ruby Nora Ella Daisy Ivy Rosa Poppy Zoe Clara Hazel Wendy Luna".split()
HE_ENDINGS, SHE_ENDINGS = ("o", "us", "in"), ("a", "i", "elle")
SYLLABLES = "bra del fam gor jul kep lam mir nov pel quin ras sor tav ulm vel wim yor zan".split()
TOYS = (
    "ball kite drum boat doll lamp bell whistle scarf hat book ring key cup basket coin button "
    "spoon ribbon feather"
).split()
COLOURS = "red blue green yellow white black brown golden silver purple orange pink".split()
PLACES = {  # the place: how to be there
    "river": "by the river", "forest": "in the forest", "market": "at the market",
    "meadow": "in the meadow", "old mill": "near the old mill", "beach": "on the beach",
    "garden": "in the garden", "village": "in the village", "hill": "on the hill",
    "lake": "at the lake", "farm": "on the farm", "castle": "near the castle",
    "orchard": "in the orchard", "bridge": "under the bridge", "harbour": "at the harbour",
}
HIDING = (
    "under a flat stone", "behind the old wall", "inside a hollow log", "beneath the stairs",
    "in the tall grass", "under the kitchen table", "behind a rose bush", "next to the well",
    "in a wooden box", "on top of the shed", "between two roots", "at the bottom of a bag",
    "inside an empty barrel", "under a heap of straw", "beside the garden gate",
)
ITEMS = {  # what goes into a bag: what it is good for later on
    "rope": "pull the cart out of the mud", "lantern": "see the way in the dark",
    "blanket": "keep warm", "map": "find the right path", "bottle of water": "put out the fire",
    "shovel": "clear the snow from the door", "umbrella": "stay dry", "loaf of bread": "make lunch",
    "hammer": "mend the broken fence", "needle": "sew up the torn sail",
    "ladder": "reach the high window", "bucket": "carry water to the flowers",
}
CROPS = "apples pears plums nuts eggs shells cherries stones flowers mushrooms".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "day": "night", "up": "down", "old": "young",
    "wet": "dry", "happy": "sad", "loud": "quiet", "full": "empty", "soft": "hard",
    "heavy": "light", "open": "closed", "near": "far",
}
WORDS = {
    "colour": COLOURS, "animal": list(ANIMALS), "toy": TOYS,
    "animals": [PLURALS.get(kind, kind + "s") for kind in ANIMALS],
    "size": ["little", "small", "tiny", "big", "young", "clever", "shy", "brave", "kind", "lazy"],
    "glad": ["happy", "glad", "proud", "cheerful", "full of joy", "very pleased"],
    "low": ["sad", "worried", "upset", "unhappy", "close to tears", "gloomy"],
    "manner": ["slowly", "quickly", "quietly", "carefully", "calmly", "without a word"],
    "meal": ["hot soup", "fresh bread", "sweet pie", "cheese rolls", "pancakes", "apple cake"],
    "said": ["said", "said", "whispered", "cried", "called", "shouted"],
    "time": ["morning", "afternoon", "evening"],
}
WEATHER = {  # what the sky does, how that feels, what would help
    "rainy": ("the rain fell on the roofs", "wet", "a dry roof"),
    "windy": ("the wind shook the trees", "cold", "a warm coat"),
    "sunny": ("the sun shone on the fields", "hot", "a cool drink"),
    "snowy": ("the snow covered the path", "cold", "a bright fire"),
    "foggy": ("the fog hid the houses", "lost", "a good lamp"),
}
OPENINGS = (
    "Once upon a time, there was a <size> {kind} named {name}.",
    "Once upon a time, a <size> {kind} named {name} lived [{at}|in {home}].",
    "One {weather} <time>, a <size> {kind} called {name} was {at}.",
    "There was once a <size> {kind} with {part}. {His} name was {name}.",
    "{name} was a <size> {kind} who liked to {skill}. {He} lived in {home}.",
    "It was a {weather} {day}, and {sky}. {name} the {kind} was {at}.",
)
PLOTS = {
    "lost": (
        ("{name} had a {hue} {thing}. [{He} took it everywhere.|{He} loved it very much.|]",
         "{His} best [toy|thing] was a {hue} {thing}[ from {his} mother|]."),
        ("One {day}, the {thing} was gone.", "But on {day} {he} could not find the {thing}.",
         "One <time>, {he} lost the {hue} {thing} {at2}."),
        ('{name} was <low>. "[Where is my {thing}?|My {hue} {thing} is gone!]" {he} <said>.',
         "{name} felt <low> because the {thing} was {hue} and there was no other like it."),
        ("{He} looked {hid2}, but there was only a <colour> <toy>[ and some dust|].",
         "{He} looked <manner> {hid2}. It was not there."),
        ('Then {name2} the {kind2} came by. "Why are you <low>?" {he2} asked.',
         "A {kind2} named {name2} saw {him} and stopped to help."),
        ('"I have lost my {hue} {thing}," <said> {name}. "[Can|Will] you help me, {name2}?"', ""),
        ("{name2} looked <manner> {hid}, and there [was|lay] the {hue} {thing}!",
         "They searched together <manner>. At last {name2} found the {thing} {hid}."),
        ('"[Thank you|You are a true friend], {name2}!" <said> {name}. {He} was <glad>.',
         "{name} was <glad> because {he} had {his} {hue} {thing} again."),
    ),
    "swap": (
        ("{name} had a {hue} {thing}, and {his} friend {name2} the {kind2} had a {hue2} {thing2}.",
         "{name2} the {kind2} had a {hue2} {thing2}. {name} only had a {hue} {thing}."),
        ("{name} [looked at|wanted] the {thing2} because it was {hue2}.",
         '"I like your {hue2} {thing2}," <said> {name}.'),
        ('"[I like your {thing}|Your {thing} is nice]," <said> {name2}. "[Let us|We can] swap."',
         '{name2} thought [for a while|quietly]. '
         '"Give me the {hue} {thing} and it is yours," {he2} <said>.'),
        ("So {name} gave {name2} the {hue} {thing} and got the {hue2} {thing2}.",
         "They swapped. Now {name} had the {hue2} {thing2} and {name2} had the {hue} {thing}."),
        ("On {day}, {name} [missed|thought of] {his} old {thing} and felt <low>.", "",
         "{name} took the {thing2} {at} and showed it to a <size> <animal>."),
        ("{name2} was <glad> with the {thing}, and {name} was <glad> with the {thing2}.",
         "In the end they shared both, the {thing} and the {thing2}."),
    ),
    "count": (
        ("{name} went to the {place} and found {n1} {crop}.",
         "On {day}, {he} had {n1} {crop} in a <colour> basket."),
        ('{name2} the {kind2} came with {n2} {crop}. "[Take them|They are for you]," {he2} <said>.',
         "Then {he} [met|saw] a {kind2} named {name2}, who gave {him} {n2} {crop}."),
        ("{name} counted <manner>. {n1} and {n2} make {sum}.",
         '"[Now I have|That makes] {sum} {crop}!" <said> {name}.'),
        ("They took the {sum} {crop} to {home2} and made <meal>.",
         "{name} put all {sum} {crop} {hid}, because <animals> like {crop}."),
        ("{name2} was <glad>[ because {name} said thank you|].", "They ate until they were full."),
    ),
    "trip": (
        ("{name} wanted to walk from the {place} to the {place2}.",
         '"I will go to the {place2}," {he} told {his} mother.'),
        ("{He} packed a {item1}, a {item2} and a {item3}.",
         "Into {his} {hue} bag {he} put a {item1}, a {item2} and a {item3}."),
        ("On the way, {he} took out the {item1} to {use1}.",
         "First {he} needed the {item1}, because {he} had to {use1}."),
        ("Then {he} met {name2} the {kind2}, who was <low>. {name} used the {item2} to {use2}.",
         'Later a {kind2} named {name2} <said>, "I must {use2}!" {name} gave {him2} the {item2}.'),
        ("At last, only the {item3} was left. It helped them to {use3}.",
         '"What is the {item3} for?" asked {name2}. "To {use3}," <said> {name}.'),
        ("In the <time> they came to the {place2} and were <glad>.",
         "They reached the {place2}, tired but <glad>, and ate <meal>."),
    ),
    "storm": (
        ("It was {weather}, and {sky}.", "All <time> {sky}."),
        ("{name} was {feel} because it was so {weather}.",
         '"I am {feel}," {he} <said>. "[I wish I had|I need] {wish}."'),
        ("{He} knocked <manner> at a <colour> door. It was the home of {name2} the {kind2}.",
         "{He} walked <manner> to {home2}, where {name2} the {kind2} lived."),
        ('"[May I come in|Can I stay here]?" asked {name}. "I am {feel}."',
         "{name2} saw that {he} was {feel} and opened the door."),
        ('"Come in, {name}!" <said> {name2}. "I have {wish} and <meal>."',
         "{name2} gave {him} {wish} and some <meal>."),
        ("Soon {name} was not {feel} any more, and {he} was <glad>.",
         "They sat together and told stories about a <size> <animal>."),
        ("{name} gave {name2} a {hue} {thing} to say thank you.", ""),
    ),
    "gift": (
        ("On {day} it was the birthday of {his} friend {name2}, a <size> {kind2}.",
         "{His} friend {name2} the {kind2} had a birthday on {day}."),
        ("{name} did not know what to give {him2}, so {he} asked a <size> <animal>.",
         '"What does a {kind2} like?" {name} asked a <animal>. "A {kind2} likes {food2}."'),
        ("{He} made a {hue} {thing} and [hid it|kept it] {hid} until {day}.",
         "{He} bought a {hue} {thing} {at2} for {n1} coins and put it {hid}."),
        ('On {day}, {name} <said>, "[Close your eyes|Look here], {name2}!"',
         "When {day} came, {name} took the {thing} from its place {hid}."),
        ('"A {hue} {thing}!" <said> {name2}. "[It is lovely|Thank you], {name}!"',
         "{name2} was <glad> because {he2} had always wanted a {hue} {thing}."),
        ("Then all the <animals> and <animals> ate <meal>.", "They played with the {thing} {at}."),
    ),
    "race": (
        ("{name} could {skill} very well, and {name2} the {kind2} could {skill2}.",
         "{name} met {name2}, a <size> {kind2} with {part2}."),
        ('"Let us race from the {place} to the {place2}," <said> {name2}.',
         '"Who is first at the {place2} gets a {hue} {thing}," <said> {name2}.'),
        ("{name} ran <manner>, but {name2} [fell and hurt a foot|stopped to eat {food2}].",
         "{name} started <manner> and {name2} started <manner>."),
        ("{name} saw that {name2} was <low> and went back for {him2}.",
         '"Wait for me, {name}!" <said> {name2}. So {name} waited {hid2}.'),
        ("They came to the {place2} together, and both were <glad>.",
         "{name} and {name2} reached the {place2} at the same time."),
        ("They shared the {hue} {thing}.", "A <animal> gave them a {hue} {thing} and <meal>."),
    ),
    "facts": (),
}
ENDINGS = (
    "", "The end.", "From that day on, {name} and {name2} were friends.", "Then {name} went home.",
    "That night, {name} slept in {home} and dreamed of a <colour> <toy>.",
    "{name2} went back to {home2}, and {name} went back to {home}.",
)
FILLERS = (
    "A <size> <animal> was watching [quietly|from afar].", "It was {weather}, and {sky}.",
    "{name} was {feel} because it was {weather}.", "Soon it was time to eat <meal>.",
    "Not far away, {n1} <animals> were playing with a <colour> <toy>.",
    "{name} wanted to eat {food}, because a {kind} likes {food}.",
    '"It is {weather} today," <said> {name}. "I want {wish}."',
    "{name} waited [a while|quietly] {at}.",
)
QUESTIONS = {
    "lost": "What had {name} lost? {He} had lost a {hue} {thing}.",
    "swap": "Who had the {hue2} {thing2} first? {name2} the {kind2} had it first.",
    "count": "How many {crop} were there? There were {sum} {crop}.",
    "trip": "What was in the bag? There was a {item1}, a {item2} and a {item3}.",
    "storm": "Why was {name} {feel}? {name} was {feel} because it was {weather}.",
    "gift": "What did {name2} get? {name2} got a {hue} {thing} from {name}.",
    "race": "Where did the race end? It ended at the {place2}.",
}
FACTS = (
    "A {kind} lives in {home}.", "A {kind} [eats|likes to eat] {food}.", "A {kind} has {part}.",
    "What does a {kind} eat? A {kind} eats {food}.", "Where does a {kind} live? In {home}.",
    "A {kind} {sound}, because that is how a {kind} talks.", "A {kind} can {skill}.",
    "The {kind} goes back to {home} because it wants to eat {food}.",
    "{n1} {crop} and {n2} {crop} make {sum} {crop}.", "{n1} and {n2} make {sum}.",
    "The day after {day} is {next}.", "After {month} comes {next2}.",
    "The opposite of {word} is {opposite}.", "If it is not {word}, it is {opposite}.",
    "You need a {item} to {use}.", "What is a {item} for? It is there to {use}.",
)


def pick_name(rng: random.Random, female: bool) -> str:
    """A known name, or a made-up one whose ending tells the pronoun (it can only be copied)."""
    if rng.random() < 0.7:
        return rng.choice(SHE_NAMES if female else HE_NAMES)
    stem = "".join(rng.sample(SYLLABLES, rng.choice((1, 1, 2))))
    return (stem + rng.choice(SHE_ENDINGS if female else HE_ENDINGS)).capitalize()


def pick_person(rng: random.Random, suffix: str, taken: Container[str]) -> dict[str, str]:
    """The slots of one character; the suffix tells hero ("") from friend ("2")."""
    female = rng.random() < 0.5
    name = pick_name(rng, female)
    while name in taken:
        name = pick_name(rng, female)
    child = "girl" if female else "boy"
    kind = child if rng.random() < 0.15 else rng.choice(list(ANIMALS))
    home, food, _, skill, part = ANIMALS.get(kind, CHILD)
    pronouns = ("she", "her", "her") if female else ("he", "him", "his")
    values = dict(zip(("he", "him", "his"), pronouns, strict=True))
    values |= {"name": name, "kind": kind, "home": home}
    values |= {"He": pronouns[0].capitalize(), "His": pronouns[2].capitalize()}
    values |= {"food": food, "skill": skill, "part": part}
    return {key + suffix: value for key, value in values.items()}


def pick_cast(rng: random.Random) -> dict[str, str]:
    """Everything that has to stay the same from the first sentence of a story to the last."""
    cast = pick_person(rng, "", ())
    cast |= pick_person(rng, "2", (cast["name"],))
    places = rng.sample(list(PLACES), 2)
    for suffix, place in zip(("", "2"), places, strict=True):
        cast |= {"place" + suffix: place, "at" + suffix: PLACES[place]}
    cast["thing"], cast["thing2"] = rng.sample(TOYS, 2)
    cast["hue"], cast["hue2"] = rng.sample(COLOURS, 2)
    cast["hid"], cast["hid2"] = rng.sample(HIDING, 2)
    for number, item in enumerate(rng.sample(list(ITEMS), 3), start=1):
        cast |= {f"item{number}": item, f"use{number}": ITEMS[item]}
    weather = rng.choice(list(WEATHER))
    cast |= zip(("sky", "feel", "wish"), WEATHER[weather], strict=True)
    cast["weather"] = weather
    first, second = rng.randint(2, 6), rng.randint(2, 6)
    cast |= {"crop": rng.choice(CROPS), "day": rng.choice(DAYS)}
    cast |= {"n1": NUMBERS[first], "n2": NUMBERS[second], "sum": NUMBERS[first + second]}
    return cast


def expand(rng: random.Random, template: str, cast: dict[str, str]) -> str:
    """Fill in one template: choices first, so that what is not chosen costs no random draw."""
    template = re.sub(r"\[(.*?)\]", lambda match: rng.choice(match[1].split("|")), template)
    template = re.sub(r"<(\w+)>", lambda match: rng.choice(WORDS[match[1]]), template)
    return template.format_map(cast)


def tidy(text: str) -> str:
    """Single blanks, articles before vowels, capitals where sentences and speech begin."""
    text = re.sub(r" +", " ", text).strip()
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r'(^|[.!?] "?|, ")([a-z])', lambda match: match[1] + match[2].upper(), text)


def write_facts(rng: random.Random) -> str:
    """A paragraph of three to seven statements that are true in every story."""
    sentences = []
    for _ in range(rng.randint(3, 7)):
        kind = rng.choice(list(ANIMALS))
        home, food, sound, skill, part = ANIMALS[kind]
        first, second = rng.randint(2, 6), rng.randint(2, 6)
        day, month = rng.randrange(7), rng.randrange(12)
        word, opposite = rng.choice(list(OPPOSITES.items()))
        item, use = rng.choice(list(ITEMS.items()))
        slots = dict(kind=kind, home=home, food=food, sound=sound, skill=skill, part=part)
        slots |= {"n1": NUMBERS[first], "n2": NUMBERS[second], "sum": NUMBERS[first + second]}
        slots |= {"day": DAYS[day], "next": DAYS[(day + 1) % 7]}
        slots |= {"month": MONTHS[month], "next2": MONTHS[(month + 1) % 12]}
        slots |= {"word": word, "opposite": opposite, "item": item, "use": use}
        slots |= {"crop": rng.choice(CROPS)}
        sentences.append(expand(rng, rng.choice(FACTS), slots))
    return tidy(" ".join(sentences))


def write_story(rng: random.Random) -> str:
    """One story: an opening, the beats of a plot with asides between them, and an ending."""
    plot = rng.choice(list(PLOTS))
    if plot == "facts":
        return write_facts(rng)
    cast = pick_cast(rng)
    sentences = [rng.choice(OPENINGS)]
    for beat in PLOTS[plot]:
        sentences.append(rng.choice(beat))
        if rng.random() < 0.15:
            sentences.append(rng.choice(FILLERS))
    sentences.append(rng.choice(ENDINGS))
    if rng.random() < 0.25:
        sentences.append(QUESTIONS[plot])
    written = [expand(rng, sentence, cast) for sentence in sentences if sentence]
    return tidy(" ".join(dict.fromkeys(written)))  # asides may repeat what was said before


def stories(seed: int, reserved: Container[str] = ()) -> Iterator[str]:
    """An endless stream of different stories, none of which is among the reserved ones."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        story = write_story(rng)
        if story not in seen and story not in reserved:
            seen.add(story)
            yield story
