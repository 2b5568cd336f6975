// The sentences that the page searches, by topic.
export const topics = {
  travel: [
    "The train was an hour late.",
    "Our plane lands at six in the morning.",
    "We missed the last bus home.",
    "The hotel has a view of the sea.",
  ],
  food: [
    "Add a pinch of salt to the soup.",
    "The bread is still warm from the oven.",
    "She drinks two cups of coffee every morning.",
    "This restaurant has good vegetarian dishes.",
  ],
  weather: [
    "It has been raining all day.",
    "A storm is coming tonight.",
    "The sun is finally out.",
    "Snow covered the whole garden.",
  ],
  health: [
    "I have a terrible headache.",
    "The doctor told him to rest for a week.",
    "She runs five kilometres before work.",
    "My tooth hurts when I eat something cold.",
  ],
  money: [
    "The rent goes up again next month.",
    "I would like to open a bank account.",
    "He paid with a credit card.",
    "They are saving for a new house.",
  ],
  work: [
    "The meeting was moved to Friday.",
    "She got a job at a big company.",
    "My computer crashed and I lost the file.",
    "He forgot the password of his account.",
  ],
  music: [
    "A man is playing the guitar.",
    "The band gave a wonderful concert.",
    "She sings in a choir.",
    "I cannot get this song out of my head.",
  ],
  animals: [
    "The cat is asleep on the sofa.",
    "A dog is chasing a ball in the park.",
    "Birds are singing in the trees.",
    "The horse jumped over the fence.",
  ],
};

// To click instead of typing.
export const examples = ["I can't log in.", "It is pouring.", "A kitten naps.", "I need a dentist."];
