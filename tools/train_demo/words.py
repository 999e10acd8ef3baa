# ruff: noqa: E501 (one wording a line)
"""Words for questions outside the domain. Every tenth word of a list is kept from training."""

from collections.abc import Mapping

_LISTS: dict[str, str] = {
    "place": """paris london berlin tokyo rome madrid moscow beijing new york|chicago boston sydney cairo delhi mumbai
    france germany italy spain england|the united states|china india brazil canada australia japan egypt russia mexico
    norway sweden finland poland greece turkey kenya nigeria peru chile argentina africa europe asia antarctica|the moon
    mars jupiter venus|the sun|california texas florida hawaii amsterdam vienna prague lisbon dublin oslo stockholm
    athens istanbul bangkok singapore seoul portugal switzerland austria belgium denmark iceland ireland scotland wales
    hungary ukraine israel iran iraq pakistan vietnam thailand korea indonesia cuba|the sahara|the alps|mount everest
    the amazon|the pacific ocean|the north pole""",
    "person": """einstein newton shakespeare napoleon mozart beethoven|barack obama|donald trump|joe biden|angela merkel
    elon musk|bill gates|steve jobs|marie curie|isaac newton|charles darwin|leonardo da vinci|picasso|van gogh|plato
    aristotle socrates cleopatra|julius caesar|the queen|the king|the president|the pope|taylor swift|michael jackson
    elvis madonna|harry potter|batman superman|sherlock holmes|mickey mouse|santa claus|my mother|my father|my boss
    my friend|my brother|my sister|the teacher|the doctor|lionel messi|cristiano ronaldo|alan turing|ada lovelace
    gandhi|martin luther king|nelson mandela|galileo|columbus|your favorite singer|the prime minister|anna|john|peter
    mary|the mayor|the author|the winner""",
    "animal": """dog cat horse cow pig sheep goat chicken duck bird eagle owl fish shark whale dolphin elephant lion tiger
    bear wolf fox rabbit mouse rat snake lizard frog turtle monkey gorilla giraffe zebra camel kangaroo koala panda
    penguin spider ant bee butterfly fly mosquito worm snail dinosaur dragon unicorn parrot puppy kitten""",
    "thing": """car bus train plane bicycle boat ship truck house building tower bridge road street tree flower grass leaf
    river lake sea mountain hill beach cloud rain snow sky apple banana lemon cherry grape pear carrot potato
    tomato onion bread cheese egg cake pizza burger salad soup rice pasta coffee tea milk water juice wine beer table
    chair bed sofa lamp door window wall floor roof kitchen room phone computer laptop keyboard screen camera television
    book newspaper letter pen pencil paper bag box bottle cup plate knife fork spoon hat shirt shoe jacket dress coat
    sock glove ring watch clock key money coin ball guitar piano drum violin knee hand foot head face eye nose mouth ear
    hair heart leg arm finger man woman child boy girl baby person people crowd king queen robot toy doll kite flag map
    ticket umbrella mirror candle fire sign logo text word number license plate|traffic light|swimming pool|fridge
    ladder hammer nail rope tent rocket satellite helicopter motorcycle wheel engine battery lighthouse castle church
    farm garden forest desert island volcano waterfall planet star sign|snowman sandwich sausage steak garlic pepper""",
    "topic": """history physics chemistry biology mathematics geography philosophy psychology politics economics religion
    art music football basketball tennis baseball cricket chess cooking travel gardening fashion movies books poetry
    science space gravity electricity magnetism evolution photosynthesis democracy capitalism communism inflation taxes
    bitcoin blockchain|the stock market|climate change|global warming|world war two|the roman empire|the french revolution
    the cold war|quantum mechanics|relativity|black holes|dark matter|the big bang|dna|genes|vaccines|cancer diabetes
    vitamins exercise yoga meditation sleep dreams love friendship happiness life death time money war peace justice
    python java javascript linux windows docker git sql html|operating systems|databases|compilers|cars airplanes
    computers phones|the internet|social media|facebook google amazon apple netflix youtube|video games|minecraft pokemon
    star wars|the olympics|the world cup|christmas easter halloween|weddings dogs cats whales dinosaurs volcanoes
    earthquakes hurricanes|the weather|the ocean|rivers mountains forests|wine beer coffee tea chocolate bread cheese
    sushi pizza pasta|french cooking|calculus algebra statistics probability|prime numbers|infinity|grammar|spelling
    latin greek spanish chinese|my homework|my job|my car|my dog|your opinion|marketing accounting law medicine nursing
    engineering architecture farming fishing sailing|the news|elections|human rights|energy|solar power|nuclear power""",
    "act": """cook rice|bake a cake|fix my car|write a poem|learn french|lose weight|sleep better|make money|buy a house
    play the piano|play football|drive a car|fly a plane|swim|dance|sing|run a marathon|build a table|paint a wall
    install linux|write code|sort a list|reverse a string|open a file|start a business|find a job|make friends
    learn to cook|tie a tie|plant a tree|grow tomatoes|train a dog|boil an egg|make coffee|invest money|pay taxes
    quit smoking|travel to paris|book a flight|order a pizza|call a taxi|wash clothes|clean the kitchen|repair a bike
    study for an exam|write an essay|solve an equation|translate a sentence|speak spanish|win at chess|meditate
    stay healthy|get rich|hack a computer|delete a file|send an email|read a map|use excel|make bread|cut hair""",
    "quality": """tall old heavy fast deep far long expensive cold hot rich famous dangerous strong smart high strange""",
    "verb": """run eat drink sleep fly swim sing cry laugh die live work play fight dream bark jump grow think talk vote""",
    "job": """doctor lawyer teacher nurse pilot poet chef singer pirate soldier farmer president banker scientist""",
    "maker": """invented discovered wrote painted built won founded killed married directed composed designed""",
    "work": """hamlet|the mona lisa|the bible|the telephone|the light bulb|penicillin|america|the eiffel tower|the internet
    the world cup|romeo and juliet|star wars|the lord of the rings|moby dick|the iliad|microsoft|the piano|the airplane
    the steam engine|gunpowder|the great wall|titanic|the odyssey|the last election|the super bowl|the nobel prize""",
    "language": """french german spanish italian chinese japanese latin russian arabic hindi portuguese dutch swedish""",
    "gibberish": """asdf qwerty blah foo bar lorem ipsum dolor xyzzy zzz hmm abc jkl wxyz test1 grrr uiop tralala bim bam""",
}


def _split(text: str) -> list[str]:
    """Words of one line, where `|` parts entries of several words."""
    words: list[str] = []
    for line in text.split("\n"):
        parts = [part.strip() for part in line.split("|")]
        if len(parts) == 1:
            words += parts[0].split()
            continue
        for part in parts:
            words += [part] if len(part.split()) <= 4 else part.split()
    return [word for word in words if word]


_ALL = {name: _split(text) for name, text in _LISTS.items()}
WORDS: Mapping[str, list[str]] = {
    name: [word for at, word in enumerate(words) if at % 10 != 7 or len(words) < 25]
    for name, words in _ALL.items()
}
HELD_WORDS: Mapping[str, list[str]] = {
    name: [word for at, word in enumerate(words) if at % 10 == 7 or len(words) < 25]
    for name, words in _ALL.items()
}
