/*
 * http_url.c
 *	  The URL of an endpoint, and segments of a path.
 *
 * libcurl's own parser decides what a URL says, because it is the one that
 * decides where the key goes; a second opinion could only differ.  Whatever it
 * is lenient about is refused before, so that what is stored is what is meant.
 */
#include "postgres.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <netinet/in.h>

#include <curl/curl.h>

#include "http.h"

/* Whether nobody but this machine can be behind a host */
static bool
is_loopback(const char *host)
{
	char		text[INET6_ADDRSTRLEN + 2];
	struct in_addr v4;
	struct in6_addr v6;
	size_t		len = strlen(host);

	if (pg_strcasecmp(host, "localhost") == 0)
		return true;
	if (inet_pton(AF_INET, host, &v4) == 1)
		return (ntohl(v4.s_addr) >> 24) == 127;
	if (host[0] != '[' || len >= sizeof(text))
		return false;
	strlcpy(text, host + 1, len - 1);	/* without the closing bracket */
	return inet_pton(AF_INET6, text, &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

/* What may not be in the text of an endpoint, whatever it means; or NULL */
static const char *
find_problem(const char *url)
{
	const char *host;
	const char *p;
	size_t		len;

	for (p = url; *p != '\0'; p++)
	{
		if (*p <= ' ' || *p > '~')
			return "a URL is printable ASCII without spaces";
	}
	if (pg_strncasecmp(url, "https://", 8) == 0)
		host = url + 8;
	else if (pg_strncasecmp(url, "http://", 7) == 0)
		host = url + 7;
	else
		return "it does not begin with https://";
	if (strpbrk(url, "?#\\") != NULL)
		return "it has a query, a fragment or a backslash";
	len = strcspn(host, "/");
	if (memchr(host, '@', len) != NULL)
		return "it has a user or a password";
	if (len == 0 || memchr(host, '%', len) != NULL)
		return "its host is not a name or an address";
	return NULL;
}

/* Cuts trailing slashes, one "/v1", and slashes before that */
static void
strip_path(char *path)
{
	size_t		len = strlen(path);

	while (len > 0 && path[len - 1] == '/')
		len--;
	if (len >= 3 && strncmp(path + len - 3, "/v1", 3) == 0)
		len -= 3;
	while (len > 0 && path[len - 1] == '/')
		len--;
	path[len] = '\0';
}

/* The normal form: scheme and host in lower case, no default port */
static char *
normal_form(const char *scheme, const char *host, const char *port,
			const char *path)
{
	size_t		room = strlen(scheme) + strlen(host) + strlen(path) + 5 +
		(port != NULL ? strlen(port) : 0);
	char	   *form = palloc_extended(room, MCXT_ALLOC_NO_OOM);
	char	   *p;

	if (form == NULL)
		return NULL;
	snprintf(form, room, "%s://%s%s%s", scheme, host,
			 port != NULL ? ":" : "", port != NULL ? port : "");
	for (p = form; *p != '\0'; p++)
		*p = pg_ascii_tolower((unsigned char) *p);
	strlcat(form, path, room);
	return form;
}

/* Nothing raises while libcurl's memory is held */
char *
http_check_endpoint(const char *url, const char **problem)
{
	CURLU	   *parsed;
	char	   *scheme = NULL;
	char	   *host = NULL;
	char	   *port = NULL;
	char	   *path = NULL;
	char	   *form = NULL;

	*problem = find_problem(url);
	if (*problem != NULL)
		return NULL;
	parsed = curl_url();
	if (parsed == NULL)
		*problem = "out of memory";
	else if (curl_url_set(parsed, CURLUPART_URL, url, CURLU_DISALLOW_USER) != CURLUE_OK ||
			 curl_url_get(parsed, CURLUPART_SCHEME, &scheme, 0) != CURLUE_OK ||
			 curl_url_get(parsed, CURLUPART_HOST, &host, 0) != CURLUE_OK ||
			 curl_url_get(parsed, CURLUPART_PATH, &path, 0) != CURLUE_OK)
		*problem = "it is not a valid URL";
	else if (strcmp(scheme, "https") != 0 && !is_loopback(host))
		*problem = "http is accepted for loopback only";
	else
	{
		/* no port is not an error: it is the scheme's */
		if (curl_url_get(parsed, CURLUPART_PORT, &port,
						 CURLU_NO_DEFAULT_PORT) != CURLUE_OK)
			port = NULL;
		strip_path(path);
		form = normal_form(scheme, host, port, path);
		if (form == NULL)
			*problem = "out of memory";
	}
	curl_free(scheme);
	curl_free(host);
	curl_free(port);
	curl_free(path);
	curl_url_cleanup(parsed);
	return form;
}

char *
http_encode_segment(const char *text)
{
	static const char hex[] = "0123456789ABCDEF";
	char	   *encoded = palloc(3 * strlen(text) + 1);
	char	   *out = encoded;

	for (; *text != '\0'; text++)
	{
		unsigned char c = (unsigned char) *text;

		if (c < 0x80 && (isalnum(c) || strchr("-._~", c) != NULL))
			*out++ = c;
		else
		{
			*out++ = '%';
			*out++ = hex[c >> 4];
			*out++ = hex[c & 15];
		}
	}
	*out = '\0';
	return encoded;
}
