// The theme writes its news to the console; readers look there for errors.
{
  const log = console.log;
  console.log = (...news) => {
    if (!String(news[0]).startsWith("[PST]")) log(...news);
  };
}
